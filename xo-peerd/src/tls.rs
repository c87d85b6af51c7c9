//! TLS for the peer channel: TLS 1.3, both sides show a certificate of the cluster's CA, and a peer is the
//! node that its certificate names.

use std::path::Path;
use std::sync::Arc;

use rustls::client::verify_server_name;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection};

use crate::config::TlsFiles;

/// What a daemon needs to open and to accept peer channels.
#[derive(Clone)]
pub(crate) struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    own: CertificateDer<'static>,
}

/// Why the certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    /// A file cannot be read or is not PEM.
    #[error("{0}: {1}")]
    File(String, String),
    /// The key does not fit, the CA is no CA ...
    #[error("certificates: {0}")]
    Bad(String),
}

impl Tls {
    /// Reads the files of `[tls]`.
    pub(crate) fn load(files: &TlsFiles) -> Result<Tls, TlsError> {
        let bad = |e: &dyn std::fmt::Display| TlsError::Bad(e.to_string());
        let mut roots = RootCertStore::empty();
        for ca in certificates(&files.ca)? {
            roots.add(ca).map_err(|e| bad(&e))?;
        }
        let roots = Arc::new(roots);
        let chain = certificates(&files.cert)?;
        let key = PrivateKeyDer::from_pem_file(&files.key)
            .map_err(|e| TlsError::File(files.key.display().to_string(), e.to_string()))?;
        let own = chain.first().cloned().ok_or_else(|| bad(&"no certificate"))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = [&rustls::version::TLS13];
        let client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&versions)
            .map_err(|e| bad(&e))?
            .with_root_certificates(Arc::clone(&roots))
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(|e| bad(&e))?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(|e| bad(&e))?;
        let server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions)
            .map_err(|e| bad(&e))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|e| bad(&e))?;
        Ok(Tls { client: Arc::new(client), server: Arc::new(server), own })
    }

    /// Does our own certificate name this node?
    pub(crate) fn check_node(&self, node: &str) -> Result<(), TlsError> {
        if names(&self.own, node) {
            Ok(())
        } else {
            Err(TlsError::Bad(format!("the certificate does not name this node, '{node}'")))
        }
    }

    /// The client's side of a channel to `node`; its certificate must name it.
    pub(crate) fn connect(&self, node: &str) -> Result<Connection, TlsError> {
        let name = ServerName::try_from(node.to_owned()).map_err(|e| TlsError::Bad(e.to_string()))?;
        ClientConnection::new(Arc::clone(&self.client), name)
            .map(Connection::from)
            .map_err(|e| TlsError::Bad(e.to_string()))
    }

    /// The server's side of a channel.
    pub(crate) fn accept(&self) -> Result<Connection, TlsError> {
        ServerConnection::new(Arc::clone(&self.server))
            .map(Connection::from)
            .map_err(|e| TlsError::Bad(e.to_string()))
    }
}

/// Does the certificate that the peer has shown name this node?
pub(crate) fn peer_is(connection: &Connection, node: &str) -> bool {
    matches!(connection.peer_certificates(), Some([leaf, ..]) if names(leaf, node))
}

fn names(certificate: &CertificateDer<'_>, node: &str) -> bool {
    let Ok(name) = ServerName::try_from(node) else { return false };
    ParsedCertificate::try_from(certificate).is_ok_and(|c| verify_server_name(&c, &name).is_ok())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let file = |e: &dyn std::fmt::Display| TlsError::File(path.display().to_string(), e.to_string());
    let all = CertificateDer::pem_file_iter(path)
        .map_err(|e| file(&e))?
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| file(&e))?;
    if all.is_empty() { Err(file(&"no certificate in this file")) } else { Ok(all) }
}
