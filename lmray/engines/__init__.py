"""Token-level generation behind one asynchronous interface: one file an engine."""
