//! The handshake over a socket, by rustls' unbuffered connections.
//!
//! Time limits are the caller's: dropping the future abandons the handshake. On a failure that rustls has an alert for, the
//! alert is sent before the error is returned, so that the peer can tell a refused certificate from a broken network.

use std::io;
use std::sync::Arc;

use culvert_types::RefusalReason;
use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, InsufficientSizeError, UnbufferedStatus};
use tokio::net::TcpStream;

use super::context::{ClientContext, ServerContext};
use super::record::{Kernel, MAX_RECORD, RecordError, Session};
use super::verify::{PeerIdentity, PeerRefusal, PeerRole};

/// Most bytes of a handshake that are read ahead: one flight with a chain of certificates is a few KiB.
const MAX_FLIGHT: usize = 2 * MAX_RECORD;
/// What is read at once at first.
const FIRST_READ: usize = 4096;

/// A finished handshake.
pub(crate) struct Established {
    /// Keys for everything that follows.
    pub(crate) session: Session,
    /// Bytes read behind the handshake: the start of the first records.
    pub(crate) early: Vec<u8>,
    /// Who is at the other end.
    pub(crate) peer: PeerIdentity,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    /// TLS itself, the peer's certificate included.
    #[error("TLS handshake: {0}")]
    Tls(rustls::Error, PeerRole),
    /// The socket.
    #[error("TLS handshake: {0}")]
    Socket(io::Error),
    /// The peer went away without a word: somebody looked whether the port is open, as health checks do.
    #[error("TLS handshake: peer closed the connection before it sent anything")]
    Silent,
    /// The peer went away.
    #[error("TLS handshake: peer closed the connection")]
    Closed,
    /// The peer sends without end and without sense.
    #[error("TLS handshake: peer sent more than {MAX_FLIGHT} bytes in one flight")]
    Flight,
    /// The keys could not be taken over.
    #[error("TLS handshake: {0}")]
    Keys(RecordError),
}

impl HandshakeError {
    /// The reason in events and metrics.
    pub(crate) fn reason(&self) -> RefusalReason {
        match self {
            Self::Tls(rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented, role) => {
                role.refusal()
            }
            Self::Tls(..) | Self::Socket(_) | Self::Silent | Self::Closed | Self::Flight | Self::Keys(_) => {
                RefusalReason::Handshake
            }
        }
    }
}

impl From<io::Error> for HandshakeError {
    fn from(error: io::Error) -> Self {
        Self::Socket(error)
    }
}

/// Answers a handshake.
pub(crate) async fn accept(stream: &TcpStream, context: &ServerContext) -> Result<Established, HandshakeError> {
    let tls = |error| HandshakeError::Tls(error, PeerRole::Client);
    let mut connection = UnbufferedServerConnection::new(Arc::clone(&context.config)).map_err(tls)?;
    let early = Handshake::new(stream).run(&mut Unbuffered::Server(&mut connection)).await?;
    let peer = peer(connection.peer_certificates(), PeerRole::Client)?;
    let (secrets, kernel) = connection.dangerous_into_kernel_connection().map_err(tls)?;
    let session = Session::new(secrets, Kernel::Server(kernel)).map_err(HandshakeError::Keys)?;
    Ok(Established { session, early, peer })
}

/// Opens a handshake.
pub(crate) async fn connect(stream: &TcpStream, context: &ClientContext) -> Result<Established, HandshakeError> {
    let tls = |error| HandshakeError::Tls(error, PeerRole::Server);
    let connection = UnbufferedClientConnection::new(Arc::clone(&context.config), context.name.clone());
    let mut connection = connection.map_err(tls)?;
    let early = Handshake::new(stream).run(&mut Unbuffered::Client(&mut connection)).await?;
    let peer = peer(connection.peer_certificates(), PeerRole::Server)?;
    let (secrets, kernel) = connection.dangerous_into_kernel_connection().map_err(tls)?;
    let session = Session::new(secrets, Kernel::Client(kernel)).map_err(HandshakeError::Keys)?;
    Ok(Established { session, early, peer })
}

/// The verifier accepted this chain; its leaf says who it was.
fn peer(
    chain: Option<&[rustls_pki_types::CertificateDer<'_>]>,
    role: PeerRole,
) -> Result<PeerIdentity, HandshakeError> {
    let leaf = chain.and_then(|chain| chain.first()).ok_or(PeerRefusal::Missing);
    leaf.and_then(PeerIdentity::of_leaf).map_err(|refusal| HandshakeError::Tls(refusal.into(), role))
}

enum Unbuffered<'a> {
    Client(&'a mut UnbufferedClientConnection),
    Server(&'a mut UnbufferedServerConnection),
}

/// What rustls wants next.
enum Next {
    /// Call again: some bytes were consumed or encoded.
    Again,
    /// Send what was encoded.
    Send,
    /// Bytes from the peer.
    Receive,
    /// The handshake is over.
    Done,
}

impl Unbuffered<'_> {
    fn role(&self) -> PeerRole {
        match self {
            Self::Client(_) => PeerRole::Server,
            Self::Server(_) => PeerRole::Client,
        }
    }

    fn is_handshaking(&self) -> bool {
        match self {
            Self::Client(connection) => connection.is_handshaking(),
            Self::Server(connection) => connection.is_handshaking(),
        }
    }

    fn step(&mut self, incoming: &mut [u8], outgoing: &mut Vec<u8>) -> (usize, Result<Next, rustls::Error>) {
        match self {
            Self::Client(connection) => next(connection.process_tls_records(incoming), outgoing),
            Self::Server(connection) => next(connection.process_tls_records(incoming), outgoing),
        }
    }
}

fn next<Data>(status: UnbufferedStatus<'_, '_, Data>, outgoing: &mut Vec<u8>) -> (usize, Result<Next, rustls::Error>) {
    let UnbufferedStatus { discard, state } = status;
    let next = state.and_then(|state| match state {
        ConnectionState::EncodeTlsData(data) => encode(data, outgoing).map(|()| Next::Again),
        ConnectionState::TransmitTlsData(data) => {
            data.done(); // it stands in `outgoing`, which is sent before anything else is done
            Ok(Next::Send)
        }
        ConnectionState::BlockedHandshake => Ok(Next::Receive),
        ConnectionState::WriteTraffic(_) => Ok(Next::Done),
        // Payload cannot come before the end of the handshake, which is looked at before bytes are fed in.
        ConnectionState::ReadTraffic(_) | ConnectionState::ReadEarlyData(_) => {
            Err(rustls::Error::General("payload during the handshake".to_owned()))
        }
        ConnectionState::PeerClosed | ConnectionState::Closed => {
            Err(rustls::Error::AlertReceived(rustls::AlertDescription::CloseNotify))
        }
        _ => Err(rustls::Error::General("unknown state of the handshake".to_owned())),
    });
    (discard, next)
}

fn encode<Data>(mut data: EncodeTlsData<'_, Data>, outgoing: &mut Vec<u8>) -> Result<(), rustls::Error> {
    let start = outgoing.len();
    let required = match data.encode(&mut []) {
        Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) => required_size,
        Ok(_) => return Ok(()),
        Err(error) => return Err(rustls::Error::General(error.to_string())),
    };
    outgoing.resize(start + required, 0);
    let written = data.encode(&mut outgoing[start..]).map_err(|error| rustls::Error::General(error.to_string()))?;
    outgoing.truncate(start + written);
    Ok(())
}

/// One handshake in progress.
struct Handshake<'a> {
    stream: &'a TcpStream,
    incoming: Vec<u8>,
    /// How much of `incoming` rustls has seen. It must not see records behind the handshake, which it would decrypt and keep,
    /// so it gets one record more at a time; and it wants to see again what it did not discard.
    seen: usize,
    outgoing: Vec<u8>,
    /// The peer has sent something.
    heard: bool,
}

impl<'a> Handshake<'a> {
    fn new(stream: &'a TcpStream) -> Self {
        Self { stream, incoming: Vec::new(), seen: 0, outgoing: Vec::new(), heard: false }
    }

    /// Runs to the end; returns what was read behind it.
    async fn run(mut self, connection: &mut Unbuffered<'_>) -> Result<Vec<u8>, HandshakeError> {
        loop {
            let (discard, next) = connection.step(&mut self.incoming[..self.seen], &mut self.outgoing);
            self.incoming.drain(..discard);
            self.seen -= discard;
            match next {
                Ok(Next::Again) => {}
                Ok(Next::Send) => self.send().await?,
                Ok(Next::Done) if !connection.is_handshaking() => {
                    self.send().await?;
                    self.incoming.drain(..self.seen);
                    self.incoming.shrink_to_fit(); // it stays with the connection until something more comes
                    return Ok(self.incoming);
                }
                Ok(Next::Receive | Next::Done) => self.show_next_record().await?,
                Err(error) => {
                    let (_, alert) = connection.step(&mut [], &mut self.outgoing);
                    if alert.is_ok() {
                        let _peer_may_be_gone = self.send().await;
                    }
                    return Err(HandshakeError::Tls(error, connection.role()));
                }
            }
        }
    }

    async fn show_next_record(&mut self) -> Result<(), HandshakeError> {
        loop {
            let record = first_record(&self.incoming[self.seen..]);
            if record > 0 {
                self.seen += record;
                return Ok(());
            }
            self.receive().await?;
        }
    }

    async fn send(&mut self) -> Result<(), HandshakeError> {
        let mut rest = &self.outgoing[..];
        while !rest.is_empty() {
            self.stream.writable().await?;
            match self.stream.try_write(rest) {
                Ok(written) => rest = &rest[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.outgoing.clear();
        Ok(())
    }

    async fn receive(&mut self) -> Result<(), HandshakeError> {
        if self.incoming.len() >= MAX_FLIGHT {
            return Err(HandshakeError::Flight);
        }
        loop {
            self.stream.readable().await?;
            self.incoming.reserve(FIRST_READ); // not before: who says nothing costs nothing
            match self.stream.try_read_buf(&mut self.incoming) {
                Ok(0) if self.heard => return Err(HandshakeError::Closed),
                Ok(0) => return Err(HandshakeError::Silent),
                Ok(_) => {
                    self.heard = true;
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Length of the first whole record in `bytes`; 0 if there is none.
fn first_record(bytes: &[u8]) -> usize {
    let Some(&[_, _, _, high, low]) = bytes.first_chunk::<5>() else { return 0 };
    let length = 5 + usize::from(u16::from_be_bytes([high, low]));
    if length <= bytes.len() { length } else { 0 }
}
