"""How processes talk: messages, connections, bulk."""
