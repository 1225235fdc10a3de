"""The frozen model behind one seam: rows in, outputs of every kind of target out."""
