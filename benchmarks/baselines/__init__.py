"""Other ways to carry the same events to a durable record, written from their usual descriptions.

Always true: all of them do the same work on an event as our stages do (`work`), for the same events, from the same load
generator, and differ only in how events are carried and stored. An event has come out when the design itself holds it
to be stored; what that is worth in a crash is said beside each (`designs`).
"""
