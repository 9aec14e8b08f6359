"""Who holds which record, told over NATS. READ FIRST.

nats.py       the one door to NATS; options.py, inbox.py are its parts
"""
