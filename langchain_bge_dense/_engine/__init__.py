"""From texts to `M3Encoding`: files, model, batches and threads, without LangChain."""

import os

# A query is some 300 parallel steps, at the end of each of which a thread waits for the others. In
# GNU's OpenMP it does so busily for 300,000 rounds, and uses up its share of a core that another
# process is busy on, too, while the thread that it waits for has none (`encode.py --busy`). Read
# when PyTorch is imported: https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
