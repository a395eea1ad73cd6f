"""Reports for people: a trial against its baseline, and many trials as tables and an HTML page.

Except for ``from_store``, nothing here accesses the store. ``comparison`` (with ``statistics``, ``noninferiority`` and
``power``) compares ``rows`` with the baseline, ``words`` states the outcome, ``columns`` lays it out.
"""
