"""Object storage: `s3://bucket/key` wherever a stage takes a path.

client.py     the connection from the standard AWS environment and files, and errors as one line
manifest.py   what a finished directory holds, written last
transfer.py   directories to and from a bucket
lease.py      one writer for an output
session.py    a stage's inputs fetched before it runs, its outputs sent after
"""
