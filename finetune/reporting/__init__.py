"""What people look at: plots, the HTML report, Grad-CAM pages and the model card.

Start with `report.py`. `templates/` has the pages.
"""
