"""Web pages in a real browser: what an agent sees of them, what it does there, and tasks."""
