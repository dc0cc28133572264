"""Faults on purpose: a real S3 store on loopback, a proxy that misbehaves, and a campaign that kills runs between them."""
