"""Repair a repository: bash in a sandbox, a git diff as the submission, hidden tests as the judge."""
