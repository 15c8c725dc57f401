//! Payload bytes of a connection from the kernel's sequence-space counters.

/// State of a TCP socket, as the kernel numbers them (`include/net/tcp_states.h`).
pub mod state {
    /// `TCP_ESTABLISHED`.
    pub const ESTABLISHED: u32 = 1;
    /// `TCP_SYN_SENT`.
    pub const SYN_SENT: u32 = 2;
    /// `TCP_FIN_WAIT1`.
    pub const FIN_WAIT1: u32 = 4;
    /// `TCP_FIN_WAIT2`.
    pub const FIN_WAIT2: u32 = 5;
    /// `TCP_CLOSE`.
    pub const CLOSE: u32 = 7;
    /// `TCP_CLOSE_WAIT`.
    pub const CLOSE_WAIT: u32 = 8;
    /// `TCP_LAST_ACK`.
    pub const LAST_ACK: u32 = 9;
    /// `TCP_CLOSING`.
    pub const CLOSING: u32 = 11;
}

/// What the kernel knows of a client's socket when it closes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ByteCounters {
    /// `tcp_sock.bytes_acked`: counts our SYN, and our FIN once acknowledged.
    pub acked: u64,
    /// `tcp_sock.bytes_received`: counts the peer's FIN.
    pub received: u64,
    /// `tcp_sock.rcv_nxt`.
    pub rcv_nxt: u32,
    /// `rcv_nxt` when FIN_WAIT2 was entered.
    pub fin_wait2_at: u32,
    /// The state that is left for `CLOSE`.
    pub last_state: u32,
}

/// Payload bytes (sent and acknowledged, received) of a connection that was opened by this socket.
///
/// Exact but for one case: a socket that received data in FIN_WAIT2 and was closed before the peer's FIN came is told one
/// received byte too few, because the kernel does not show a program whether that last step was a FIN.
#[inline(always)]
#[must_use]
pub const fn payload_bytes(counters: &ByteCounters) -> (u64, u64) {
    let our_fin = matches!(counters.last_state, state::FIN_WAIT2 | state::LAST_ACK | state::CLOSING);
    let peer_fin = match counters.last_state {
        state::CLOSE_WAIT | state::LAST_ACK | state::CLOSING => true,
        state::FIN_WAIT2 => counters.rcv_nxt != counters.fin_wait2_at,
        _ => false,
    };
    (counters.acked.saturating_sub(1 + our_fin as u64), counters.received.saturating_sub(peer_fin as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(acked: u64, received: u64, last_state: u32, rcv_nxt: u32) -> (u64, u64) {
        payload_bytes(&ByteCounters { acked, received, rcv_nxt, fin_wait2_at: 1000, last_state })
    }

    #[test]
    fn syn_and_fin_are_not_payload() {
        // 100 bytes sent, 200 received; who closed first, and how, differs.
        assert_eq!(bytes(102, 201, state::FIN_WAIT2, 1001), (100, 200), "we closed, their FIN came later");
        assert_eq!(bytes(102, 200, state::FIN_WAIT2, 1000), (100, 200), "we closed, their FIN met a time-wait socket");
        assert_eq!(bytes(102, 201, state::LAST_ACK, 0), (100, 200), "they closed, then we");
        assert_eq!(bytes(102, 201, state::CLOSING, 0), (100, 200), "both at once");
        assert_eq!(bytes(101, 200, state::ESTABLISHED, 0), (100, 200), "reset");
        assert_eq!(bytes(101, 201, state::CLOSE_WAIT, 0), (100, 200), "they closed, then reset");
        assert_eq!(bytes(0, 0, state::SYN_SENT, 0), (0, 0), "never established");
    }
}
