"""The local socket of an instance: docs/control.md says what is spoken there.

Start at `server.Control`, or at `client.ask` for the other end.

    protocol   what both ends agree on
    client     asks an instance: plain, blocking, without asyncio
    instances  the instances of this host: what each says, or why it says nothing
    server     the socket: who may ask, and how much; nothing of it holds up a job
    limits     how much those who ask may take, all together and each user
    session    one connection as the server sees it: its requests and their replies
    peer       who asks, as the kernel knows it
    requests   what is answered, and what an operator may have done
    submit     jobs that come over the socket, published on the daemon's connection
    metrics    what is answered to `metrics`
"""
