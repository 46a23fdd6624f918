"""Asks the replicas of a service for targets and survives the loss of any of them.

`remote` is what a trainer holds. Below it, in the io thread (`io_thread`):

- `session` takes the requests and `keeper` keeps a link to every replica, or gives it up;
- `discovery` finds the replicas, checks that they are one service, and waits before it tries an
  address again; `describe` asks one replica who it is;
- `links` runs one connection; `streams` its two streams, and `refusals` decides when one was meant; `stalls` decides when one counts as stuck;
- `dispatch` decides which link a request goes to, and sends the requests of a lost link again;
- `texts` does the same for texts that the teacher writes, and `pending` holds what has no answer yet;
- `answers` checks, decodes and resolves what arrives, and asks again for what arrived damaged.
"""
