"""Methods that round weights to a value grid."""
