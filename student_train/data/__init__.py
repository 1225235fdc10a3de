"""Rows of a cache in an order that one number describes, ahead of the step that wants them."""
