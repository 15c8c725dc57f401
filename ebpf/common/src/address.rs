//! One form for every address in a table: 16 bytes, network order, IPv4 as v4-mapped.

/// An IPv6 address, or an IPv4 address as `::ffff:a.b.c.d`.
///
/// Kept as four words because the kernel hands addresses to programs as words in network order; the bytes in memory are the
/// bytes on the wire.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Address {
    /// Four words, each in network order.
    pub words: [u32; 4],
}

const _: () = assert!(size_of::<Address>() == 16);

/// Third word of every v4-mapped address.
const MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Address {
    /// The IPv4 address whose four bytes are `word`, in network order.
    #[inline(always)]
    #[must_use]
    pub const fn v4(word: u32) -> Self {
        Self { words: [0, 0, MAPPED, word] }
    }

    /// The IPv6 address whose sixteen bytes are `words`, each in network order.
    #[inline(always)]
    #[must_use]
    pub const fn v6(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// Is this an IPv4 address?
    #[inline(always)]
    #[must_use]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    /// `127.0.0.0/8` or `::1`.
    #[inline(always)]
    #[must_use]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            u32::from_be(self.words[3]) >> 24 == 127
        } else {
            self.words[0] == 0 && self.words[1] == 0 && self.words[2] == 0 && self.words[3] == 1_u32.to_be()
        }
    }

    /// `0.0.0.0` or `::`.
    #[inline(always)]
    #[must_use]
    pub const fn is_unspecified(&self) -> bool {
        self.words[0] == 0
            && self.words[1] == 0
            && (self.words[2] == 0 || self.words[2] == MAPPED)
            && self.words[3] == 0
    }

    /// `fe80::/10`.
    #[inline(always)]
    #[must_use]
    pub const fn is_link_local_v6(&self) -> bool {
        u32::from_be(self.words[0]) >> 22 == 0xfe80 >> 6
    }

    /// Are the two equal? A plain comparison of words: `==` on arrays may become a call to `memcmp`, which the
    /// kernel's target does not have.
    #[inline(always)]
    #[must_use]
    pub const fn same(&self, other: &Self) -> bool {
        self.words[0] == other.words[0]
            && self.words[1] == other.words[1]
            && self.words[2] == other.words[2]
            && self.words[3] == other.words[3]
    }
}

#[cfg(feature = "user")]
mod user {
    //! Conversions that only user space needs.

    use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use super::Address;

    impl From<IpAddr> for Address {
        fn from(ip: IpAddr) -> Self {
            match ip {
                IpAddr::V4(v4) => v4.into(),
                IpAddr::V6(v6) => v6.into(),
            }
        }
    }

    impl From<Ipv4Addr> for Address {
        fn from(ip: Ipv4Addr) -> Self {
            Self::v4(u32::from_ne_bytes(ip.octets()))
        }
    }

    impl From<Ipv6Addr> for Address {
        fn from(ip: Ipv6Addr) -> Self {
            let bytes = ip.octets();
            let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
            Self::v6([word(0), word(4), word(8), word(12)])
        }
    }

    impl From<Address> for IpAddr {
        /// A v4-mapped address comes back as IPv4.
        fn from(address: Address) -> Self {
            let mut bytes = [0; 16];
            for (chunk, word) in bytes.chunks_exact_mut(4).zip(address.words) {
                chunk.copy_from_slice(&word.to_ne_bytes());
            }
            Ipv6Addr::from(bytes).to_canonical()
        }
    }
}

#[cfg(all(test, feature = "user"))]
mod tests {
    use core::net::{IpAddr, Ipv6Addr};

    use super::Address;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().expect("a literal").into()
    }

    #[test]
    fn addresses_come_back_as_they_went_in() {
        for text in ["172.26.64.5", "127.0.0.1", "0.0.0.0", "255.255.255.255", "::", "::1", "fd00::1:2", "fe80::1"] {
            assert_eq!(IpAddr::from(address(text)).to_string(), text);
        }
    }

    #[test]
    fn a_mapped_address_is_the_ipv4_address() {
        assert_eq!(address("::ffff:172.26.64.5"), address("172.26.64.5"));
        assert_eq!(Address::from("::ffff:127.0.0.1".parse::<Ipv6Addr>().expect("a literal")), address("127.0.0.1"));
        assert!(address("172.26.64.5").is_v4());
        assert!(!address("::172.26.64.5").is_v4());
    }

    #[test]
    fn classes_of_addresses_agree_with_the_standard_library() {
        for text in [
            "127.0.0.1",
            "127.255.0.9",
            "126.255.255.255",
            "128.0.0.1",
            "::1",
            "::2",
            "::",
            "0.0.0.0",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "fd00::1",
            "172.26.64.5",
        ] {
            let ip: IpAddr = text.parse().expect("a literal");
            let address = Address::from(ip);
            assert_eq!(address.is_loopback(), ip.is_loopback(), "{text}");
            assert_eq!(address.is_unspecified(), ip.is_unspecified(), "{text}");
            let link_local = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
            assert_eq!(address.is_link_local_v6(), link_local, "{text}");
            assert!(address.same(&address));
        }
        assert!(!address("fd00::1").same(&address("fd00::2")));
    }
}
