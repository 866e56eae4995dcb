"""The composition root: builds server roles from their parts and runs them.

A module a role, `process.py` for what is the same in all of them. Imported only by the commands that start servers, so
that the command itself needs the client alone.
"""
