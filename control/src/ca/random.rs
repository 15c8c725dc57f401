//! Random choices of the authority: spreading renewals, naming roots. From the cryptographic generator of aws-lc.

use std::time::Duration;

use aws_lc_rs::rand;

/// A uniformly chosen point of `0.0..1.0`.
pub(crate) fn fraction() -> f64 {
    let mut bytes = [0_u8; 8];
    // The generator of aws-lc does not fail once the process is up; should it all the same, the middle is a safe choice:
    // what is spread here are times, never secrets.
    if rand::fill(&mut bytes).is_err() {
        return 0.5;
    }
    // 53 bits: what an f64 holds exactly.
    (u64::from_be_bytes(bytes) >> 11) as f64 / (1_u64 << 53) as f64
}

/// A uniformly chosen part of `whole`.
pub(crate) fn part_of(whole: Duration) -> Duration {
    whole.mul_f64(fraction())
}

/// Eight letters and digits in base 36: tells the names of two roots apart.
pub(crate) fn base36() -> String {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    (0..8).map(|_| char::from(DIGITS[(fraction() * 36.0) as usize % 36])).collect()
}
