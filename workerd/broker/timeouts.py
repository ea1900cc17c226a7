"""How long the broker may take, in seconds."""

#: For TCP, TLS, login and opening, all together.
CONNECT_TIMEOUT = 10.0
#: For the answer to one request; then the connection counts as dead.
ANSWER_TIMEOUT = 15.0
#: For a publish to be confirmed while the broker is not blocking us.
CONFIRM_TIMEOUT = 60.0
