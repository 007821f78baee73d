"""Measurements of one model or of several side by side: quality, size, speed, memory.

Import what you need from the modules; this package imports none of them, so that reading a file's size loads no model
code.
"""
