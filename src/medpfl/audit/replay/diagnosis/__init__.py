"""Why an attack fails on a recorded update: what the update itself shows, and controlled changes where the truth is."""
