"""What every stage shares: connection, ordered reader, fenced writer, partition loop, process life cycle."""
