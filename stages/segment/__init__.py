"""Segment: classifies events and holds them to the policy."""
