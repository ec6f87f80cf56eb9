"""The durable log: what it stores (`tables`), how (`store`), and the actor everyone appends to and reads from."""
