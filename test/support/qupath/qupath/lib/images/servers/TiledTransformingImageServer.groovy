// Stand-in for qupath.lib.images.servers.TiledTransformingImageServer (QuPath 0.6 and later; abstract there), which is no
// TransformingImageServer.
package qupath.lib.images.servers

class TiledTransformingImageServer {
    private final Object server

    TiledTransformingImageServer(Object server) { this.server = server }
    Collection<URI> getURIs() { server.getURIs() }
    String getPath() { "${getClass().getName()}: ${server.getPath()}".toString() }
}
