//! Messages between the host and the agent inside a guest.
