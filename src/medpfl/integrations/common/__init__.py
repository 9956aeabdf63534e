"""What all integrations share, whatever the framework: guards that fail closed, defended updates, careful recorders.

Imports no framework.
"""
