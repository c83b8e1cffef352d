// Stand-in for qupath.lib.images.servers.TransformingImageServer (QuPath 0.2 and later; abstract there): another server's
// pixels, transformed, and its URIs.
package qupath.lib.images.servers

class TransformingImageServer {
    private final Object server

    TransformingImageServer(Object server) { this.server = server }
    Collection<URI> getURIs() { server.getURIs() }
    String getPath() { "${getClass().getName()}: ${server.getPath()}".toString() }
}
