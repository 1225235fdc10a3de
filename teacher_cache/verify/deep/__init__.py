"""The teacher runs again on some rows of a store: is what is decoded what it gives?"""
