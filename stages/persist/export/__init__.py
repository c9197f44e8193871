"""Exports of a store: files for other programs, each with a manifest that says what it is and shows any change."""
