"""Work in a terminal, judged by tests that the agent never sees."""
