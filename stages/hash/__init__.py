"""Hash: gives every event its audit hash."""
