"""Everything around the stages: streams as data, embedded servers, the supervisor and the command line.

Imports `contracts` and `stages`; neither imports this.
"""
