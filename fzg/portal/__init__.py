"""The control plane: messages, the channel state machine and, in `websocket`, its socket (spec portal)."""
