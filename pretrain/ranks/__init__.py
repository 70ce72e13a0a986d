"""The processes of a run.

`launcher` reads a rank's number and the meeting point from the environment; `rendezvous` says which ranks are missing
while they meet; `collectives` are what they compute together; `stop` hears requests to stop; `watchdog` names a rank
that hangs; `command` ends a rank with the exit status and the message that the public interface promises.
"""
