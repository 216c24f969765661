"""Recurrences as their papers print them, without any safeguard: what ``optalr.paper`` is made of.

Beside them stand the forms that we train with, in the folders of their methods. These here exist so
that anyone can run what was published, and see what our departures change. Nothing here looks at a
gradient before it believes it, bounds a step, or corrects an average that the paper does not
correct. A gradient that is not finite makes parameters that are not.
"""
