"""`kdcache verify`: is every byte what was written, and, with --deep, is it what the teacher says?"""
