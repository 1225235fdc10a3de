"""`kdcache derive`: a smaller store from a larger one, without the teacher."""
