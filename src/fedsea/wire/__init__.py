"""The wire protocol as a pure function of bytes: events, codecs and the rules of a session.

Nothing here does I/O, reads a clock or starts a thread. `docs/protocol.md` is the contract that
these modules implement; the tables in it are made from `fedsea.wire.states`.
"""
