"""Replay of recorded trades: files in (dumps, captures, our own exports), frames of the ``trades`` topic out, at any speed.

``bytesource`` opens, ``detect`` recognises, ``csv_reader`` / ``capture`` / ``columnar`` / ``kraken_rest`` parse, ``rows`` checks,
``seen`` drops repeats, ``order`` sorts and makes watermarks, ``pacing`` cuts frames in time, ``feed`` puts them together.
"""
