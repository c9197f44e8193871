"""What travels and what is agreed: events, frames, receipts, subjects, hashing, policy, settings, names, errors.

Imports nothing of ours and does no I/O. Everything here is a value or a pure function.
"""
