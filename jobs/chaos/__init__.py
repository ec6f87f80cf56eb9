"""Fault injection: what is killed, filled, torn or hung under load, and what that costs the people who are served."""
