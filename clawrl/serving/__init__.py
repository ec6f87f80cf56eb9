"""Serving: the gateway, the policy and judge engines, and the weights that flow into them."""
