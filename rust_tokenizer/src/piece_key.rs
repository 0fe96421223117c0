//! Short pieces encoded as integers, for use as hash keys.

/// The length in bytes of the longest piece that fits into its key.
pub const INLINE: usize = 15;

/// The piece `text[start..end]`, of at most `INLINE` bytes, and its length in one integer: keys are equal exactly when
/// the pieces are. The bytes after the piece are read too and masked off, which is faster than copying a variable
/// number of bytes.
#[inline(always)]
pub fn inline_key(text: &[u8], start: usize, end: usize) -> u128 {
    let length = end - start;
    debug_assert!(length <= INLINE);
    let raw = match text.get(start..start + 16).and_then(|window| <[u8; 16]>::try_from(window).ok()) {
        Some(window) => u128::from_le_bytes(window) & ((1 << (8 * length)) - 1),
        None => {
            let mut window = [0; 16];
            window[..length].copy_from_slice(&text[start..end]);
            u128::from_le_bytes(window)
        }
    };
    raw | (length as u128) << 120
}

/// The slot of a key in a table of `2^bits` entries.
#[inline(always)]
pub fn slot(key: u128, bits: u32) -> usize {
    let folded = (key as u64 ^ (key >> 64) as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (folded >> (64 - bits)) as usize
}
