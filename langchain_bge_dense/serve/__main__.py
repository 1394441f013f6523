"""`python -m langchain_bge_dense.serve`."""

from langchain_bge_dense.serve import main

main()
