"""Parts of `guards_detector.py`: the runs, their scores and the page."""
