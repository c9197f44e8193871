"""The four stages, each a process of its own, and the runtime they share. Imports `contracts` only."""
