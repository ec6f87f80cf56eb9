"""Evidence: whole runs of clawrl under several settings and seeds, and one table of what came of them."""
