"""A server of live streams, each watched and steered by a client of its own (docs/serve.md).

A client's connection (`connection.py`) reads its messages (`messages.py`) and asks the engine of a
device (`engine.py`) for a stream; the engine makes chunks, for all that are due at once, and leaves
the frames in the outbox of the client's session (`session.py`). `app.py` has the pages and what
else is served by HTTP, `guard.py` who may ask.
"""
