"""Who is here, and what each says of itself: SWIM with Lifeguard, and owner-versioned profiles.  Pure."""
