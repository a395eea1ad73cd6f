"""What people read: a trial beside its baseline, and many trials as a table and a page.

Sees settings and results only: what is shown is handed in, where it goes is for others to say. Comparisons are made in
``rows`` (with ``statistics``), said in ``words``, laid out by ``columns``.
"""
